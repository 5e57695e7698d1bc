from .growth import after_step as after_step
from .objectives import Objective as Objective
from .objectives import StayClose as StayClose
from .objectives import TaskLoss as TaskLoss
from .optimizer_groups import optimizer as optimizer
from .optimizer_groups import parameter_groups as parameter_groups
from .penalties import penalty as penalty
