from .fisher_information import fisher as fisher
from .fisher_information import mean_gradients as mean_gradients
from .selecting import score as score
from .selecting import select as select
from .selecting import selection_of as selection_of
