from .kinds.base import TaskKind as TaskKind
from .processor import Processor as Processor
from .task import Task as Task
from .task_mixture import mix_tasks as mix_tasks
