from .evaluation import evaluate as evaluate
from .loading import load as load
from .prediction import Prediction as Prediction
from .prediction import predict as predict
