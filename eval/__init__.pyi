# The public names, imported when they are first asked for.
from .download.tasks import download_task as download_task
from .encoding.encoder import EncodeOptions as EncodeOptions
from .evaluate import EvalOptions as EvalOptions
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate_tasks as evaluate_tasks
from .reports.comparison import compare_results as compare_results
from .reports.report import summarise as summarise
from .results.aggregates import averages as averages
from .results.files import TaskResult as TaskResult
from .results.files import read_results as read_results
from .tasks.known_tasks import KNOWN_TASKS as KNOWN_TASKS
from .tasks.known_tasks import KnownTask as KnownTask
from .tasks.preparation import PreparedTasks as PreparedTasks
from .tasks.preparation import prepare_tasks as prepare_tasks
from .tasks.task import Task as Task
from .tasks.task import find_tasks as find_tasks
from .tasks.task import read_task as read_task
