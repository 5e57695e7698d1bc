from .fitting import fit as fit
from .hf_reference import reference_model as reference_model
from .hf_reference import shared_reference as shared_reference
from .hf_trainer import TrainerCallback as TrainerCallback
from .memory.batch_size import largest_batch as largest_batch
from .memory.estimate import plan as plan
from .run.callbacks import Callback as Callback
from .run.callbacks import RunStatus as RunStatus
