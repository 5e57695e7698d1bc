from .kinds.base import TaskKind as TaskKind
from .processor import Processor as Processor
from .task import Task as Task
