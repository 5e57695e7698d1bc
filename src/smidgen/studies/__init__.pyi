from .comparison.comparing import compare as compare
from .comparison.study import Study as Study
from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import doctor as doctor
from .rate_search import SearchWarning as SearchWarning
from .rate_search import search as search
from .trial import Search as Search
from .trial import Trial as Trial
