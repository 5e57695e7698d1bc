from .activation_checkpointing import recomputing as recomputing
