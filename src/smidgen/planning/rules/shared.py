"""The model itself, as the owner of what sites share. A plan makes such a site where a method needs one."""

from __future__ import annotations

from smidgen.planning.site_rules import SiteRules
from smidgen.sites.site import SharedSite


class SharedRules(SiteRules):
    """Nothing to find, nothing to start from."""

    sites = (SharedSite,)
