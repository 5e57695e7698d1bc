from .base import Port as Port
from .base import register_port as register_port
from .forward_state import rows_from as rows_from
from .in_place.untying import UntiedWarning as UntiedWarning
