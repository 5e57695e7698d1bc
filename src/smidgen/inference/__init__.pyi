from .evaluation import evaluate as evaluate
from .loading import load as load
from .model_shapes import known_shapes as known_shapes
from .model_shapes import load_shapes as load_shapes
from .prediction import Prediction as Prediction
from .prediction import predict as predict
from .written_samples import WrittenSample as WrittenSample
from .written_samples import write_samples as write_samples
