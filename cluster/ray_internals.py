"""Everything that this project uses of Ray's private parts. No other file imports them.

Ray may move or change a private part in any release. So each is looked up by name when it is needed, and
:data:`PRIVATE` says what happens where it is gone. Most of them only save time: without them a run works and is slower.

Written for Ray :data:`MADE_FOR`. ``tests/test_ray_internals.py`` fails with another version until somebody has compared
this file with it. ``pyproject.toml`` allows the versions below :data:`BELOW`.

Processes that read data import this module, so it imports neither ``ray.train`` nor torch at the top.
"""

from __future__ import annotations

import functools
import importlib
import operator
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ugrl.errors import ConfigError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.data import DataContext, Dataset
    from ray.train.torch import TorchTrainer

try:
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:  # then nobody calls SchedulerPause, and Ray Data's thread uses more CPU time
    ExecutionCallback = object

MADE_FOR, BELOW = "2.60", "2.70"

# Files that Ray Train leaves in a run's folder. It continues from the first, where this project has its own
# checkpoints; the second tells whether the folder can be written.
SNAPSHOT, STORAGE_MARKER = "checkpoint_manager_snapshot.json", ".validate_storage_marker"
# Callbacks of Ray Train that start a process each and that a run does not need. Its batches come from its own streams.
# The processes of a private cluster end with it, so that nobody has to clean up its placement groups.
UNUSED_CALLBACKS, UNUSED_IF_PRIVATE = {"DatasetsCallback"}, {"PlacementGroupCleanerCallback"}
# Errors of Ray Train, which has no public names for them: workers that did not start, and workers that do not answer.
NOT_STARTED = {"WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"}
NOT_HEALTHY = {"WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"}


@dataclass(frozen=True, slots=True)
class Private:
    """A private part of Ray.

    Attributes:
        module: The module that holds it.
        name: Its name there; a dot leads to an attribute of a class.
        without: What happens if this version of Ray does not have it.
        required: Whether that is an error.
    """

    module: str
    name: str
    without: str
    required: bool = False

    def exists(self) -> bool:
        """Whether the installed Ray has it."""
        try:
            self._find()
        except (ImportError, AttributeError):
            return False
        return True

    def get(self) -> Any:
        """The object, or ``None`` where the installed Ray does not have it.

        Raises:
            ConfigError: Ray does not have it, and it is required.
        """
        try:
            return self._find()
        except (ImportError, AttributeError):
            if not self.required:
                return None
        import ray

        raise ConfigError(
            f"Ray {ray.__version__} has no {self.module}.{self.name}: {self.without}; install ray>={MADE_FOR},<{BELOW}"
        )

    def _find(self) -> Any:
        return operator.attrgetter(self.name)(importlib.import_module(self.module))


NODE = Private(
    "ray._private.worker",
    "_global_node",
    "a private cluster is not recognized; it is shut down by Ray itself, which takes seconds longer",
)
START_PARAMETERS = Private(
    "ray._private.parameter",
    "RayParams.__init__",
    "beside another Ray of this machine, a private cluster starts up to 3.5 s later",
)
NO_STACK = Private(
    "ray._private.ray_constants",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER",
    "SIGTERM just as Ray starts prints a stack before the own line",
)
FIND_CLUSTER = Private(
    "ray._private.services",
    "canonicalize_bootstrap_address",
    "the address 'auto' is not checked before Ray connects",
)
FIND_HOST = Private(
    "ray._private.services",
    "resolve_ip_for_localhost",
    "'localhost' is checked under the inner address alone",
)
NODE_RESOURCES = Private(
    "ray._private.state",
    "available_resources_per_node",
    "a search cannot see whether a node has room for a trial",
    required=True,
)
FIXED_POLICY = Private(
    "ray.train.v2._internal.execution.scaling_policy.fixed",
    "FixedScalingPolicy",
    "a process more starts with each run on a private cluster",
)
MAKE_CALLBACKS = Private(
    "ray.train.torch",
    "TorchTrainer._create_default_callbacks",
    "up to two processes more start with each run",
)
RUN_CONTROLLER = Private(
    "ray.train.torch",
    "TorchTrainer._initialize_and_run_controller",
    "a process more starts with each run on a private cluster",
)
COORDINATOR = Private(
    "ray.data._internal.cluster_autoscaler",
    "get_or_create_autoscaling_coordinator",
    "the first batch on a private cluster comes later",
)
STATISTICS = Private(
    "ray.data._internal.stats",
    "get_or_create_stats_actor",
    "the first batch on a private cluster comes later",
)
EXECUTION_CALLBACK = Private(
    "ray.data._internal.execution.execution_callback",
    "ExecutionCallback",
    "Ray Data's scheduling thread uses most of a CPU core while it waits",
)
BLOCKS = Private(
    "ray.data",
    "Dataset.iter_internal_ref_bundles",
    "the blocks of a stream cannot be taken one by one",
    required=True,
)
PRIVATE = (
    *(NODE, START_PARAMETERS, NO_STACK, FIND_CLUSTER, FIND_HOST, NODE_RESOURCES, FIXED_POLICY, MAKE_CALLBACKS),
    *(RUN_CONTROLLER, COORDINATOR, STATISTICS, EXECUTION_CALLBACK, BLOCKS),
)


# --- a cluster ------------------------------------------------------------------------------------------------------


def is_private() -> bool:
    """Whether this process started the cluster, for itself alone."""
    node = NODE.get()
    return node is not None and bool(node.is_head())


def disconnect_private() -> list[subprocess.Popen[bytes]]:
    """Disconnect from a private cluster, and leave it to the caller to end its processes, which are returned."""
    import ray

    node = NODE.get()
    setattr(importlib.import_module(NODE.module), NODE.name, None)  # so that Ray only disconnects
    ray.shutdown()
    with suppress(Exception):  # objects that Ray moved to the disk
        node.destroy_external_storage()
    return [info.process for infos in node.all_processes.values() for info in infos]


@contextmanager
def free_agent_port() -> Iterator[None]:
    """Let the agent of a private cluster take a free port while the block runs.

    Beside another Ray of this machine, it would try the usual port for 3.5 s, and everything waits for it.
    """
    plain = START_PARAMETERS.get()
    if plain is None:
        yield
        return
    parameters = importlib.import_module(START_PARAMETERS.module).RayParams

    @functools.wraps(plain)
    def made(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **{"dashboard_agent_listen_port": 0, **more})

    parameters.__init__ = made
    try:
        yield
    finally:
        parameters.__init__ = plain


def leave_signals_alone() -> None:
    """Ray puts no handler of its own before those of this process, where a crash prints no stack of Ray's then."""
    if NO_STACK.exists():
        setattr(importlib.import_module(NO_STACK.module), NO_STACK.name, True)


def find_cluster() -> str | None:
    """The address of the cluster that runs on this machine; ``None`` where Ray cannot be asked.

    Raises:
        ConnectionError, ValueError, OSError: No cluster runs here.
    """
    find = FIND_CLUSTER.get()
    return str(find("auto")) if find is not None else None


def host_for_ray(host: str) -> str:
    """The outer address of this machine, which Ray uses where it is given an inner one such as ``localhost``."""
    find = FIND_HOST.get()
    return str(find(host)) if find is not None else host


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """The logical resources that are free now, by the id of the node."""
    return dict(NODE_RESOURCES.get()())


# --- Ray Train ------------------------------------------------------------------------------------------------------


def torch_trainer(**arguments: Any) -> TorchTrainer:
    """Ray's ``TorchTrainer``, without helper processes that a run of this project does not need."""
    return _trainer_class()(**arguments)


@functools.cache
def _trainer_class() -> type[TorchTrainer]:
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            unused = UNUSED_CALLBACKS | (UNUSED_IF_PRIVATE if is_private() else set())
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]

        def _initialize_and_run_controller(self, **more: Any) -> Any:
            policy = more.get("scaling_policy")
            if policy is not None and is_private() and type(policy) is FIXED_POLICY.get():
                more["scaling_policy"] = _policy_class()(self.scaling_config)
            return super()._initialize_and_run_controller(**more)

    return Trainer


@functools.cache
def _policy_class() -> type:
    """Ray's policy for a cluster that cannot grow: it asks nobody for nodes, and starts no process for that."""
    base: Any = FIXED_POLICY.get()

    class Policy(base):
        def after_controller_start(self, train_run_context: Any) -> None:
            pass

        def _maybe_send_resource_request(self) -> None:
            pass

    return Policy


# --- Ray Data -------------------------------------------------------------------------------------------------------


def start_data_actors() -> None:
    """Start Ray Data's two actors while Ray Train starts. Ray Data would start them, and wait, at the first batch.

    For a private cluster: the actors take processes that Ray has started already.
    """
    for part in (COORDINATOR, STATISTICS):
        start = part.get()
        if start is not None:
            start()


def block_refs(dataset: Dataset) -> Iterator[ObjectRef]:
    """References to the blocks of a data set, in order, as they are made."""
    BLOCKS.get()
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


def pause_scheduler(context: DataContext) -> None:
    """Let Ray Data's scheduling thread rest between two looks; see :class:`SchedulerPause`."""
    if hasattr(context, "custom_execution_callback_classes") and ExecutionCallback is not object:
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, SchedulerPause]


class SchedulerPause(ExecutionCallback):
    """Lets Ray Data's scheduling thread rest.

    While the stream is as far ahead as it may be and no task runs, that thread asks again and again whether anything
    has changed. This takes most of a core from the training that everybody waits for.
    """

    PAUSE_S = 0.05

    def __init__(self) -> None:
        self.ended = 0.0

    def on_execution_step(self, executor: object) -> None:
        """Called after each look at the tasks."""
        if time.perf_counter() - self.ended < self.PAUSE_S:  # one that waited for a task took longer
            time.sleep(self.PAUSE_S)
        self.ended = time.perf_counter()
