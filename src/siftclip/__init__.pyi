# The public names: imported when they are first asked for.
from . import datamodules as datamodules
from . import errors as errors
from . import eval as eval
from . import selectors as selectors
from . import trainer as trainer
from .datamodules.pool.pool import Pool as Pool
from .errors import InputError as InputError
from .trainer.api.comparing import compare as compare
from .trainer.api.evaluation import evaluate as evaluate
from .trainer.api.features import Features as Features
from .trainer.api.features import embed as embed
from .trainer.api.features import embed_target as embed_target
from .trainer.api.selecting import score as score
from .trainer.api.selecting import select as select
from .trainer.api.training import plan as plan
from .trainer.api.training import train as train
from .trainer.runtime.run_dir import RunDir as RunDir

__version__: str
