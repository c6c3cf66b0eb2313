# The public names, imported when they are first asked for.
from .aggregates import averages as averages
from .comparison import compare_results as compare_results
from .download import download_task as download_task
from .encoding import EncodeOptions as EncodeOptions
from .evaluate import EvalOptions as EvalOptions
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate_tasks as evaluate_tasks
from .known_tasks import KNOWN_TASKS as KNOWN_TASKS
from .known_tasks import KnownTask as KnownTask
from .preparation import PreparedTasks as PreparedTasks
from .preparation import prepare_tasks as prepare_tasks
from .report import summarise as summarise
from .results import TaskResult as TaskResult
from .results import read_results as read_results
from .tasks import Task as Task
from .tasks import find_tasks as find_tasks
from .tasks import read_task as read_task
