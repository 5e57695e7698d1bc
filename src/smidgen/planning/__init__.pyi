from .plans import Plan as Plan
from .selection.budgets import SelectionWarning as SelectionWarning
from .selection.combine_scores import combine as combine
from .selection.select_term import Select as Select
