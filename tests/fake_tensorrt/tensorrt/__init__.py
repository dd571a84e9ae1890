"""A TensorRT that has exactly the attributes of a recorded release and compiles nothing.

The environment says which release (TQDIT_TEST_SURFACE: a file of tests/data/tensorrt_surfaces) and where to note what
was asked (TQDIT_TEST_CALLS). Touching an attribute that the release lacks is an AttributeError, as there. A "plan" is
JSON; the inspector shows one layer for each product of the parsed ONNX file: Int8 where both operands come from a
DequantizeLinear, in the words of that release. A plan also holds a digest of each weight. Of one that was built to be
refitted all can be replaced but those whose names begin with TQDIT_TEST_FOLDED.
"""

import enum
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx

SURFACE = json.loads(Path(os.environ["TQDIT_TEST_SURFACE"]).read_text())
__version__ = SURFACE["version"]
_MAJOR = int(__version__.split(".")[0])
_ENUMS = (
    "BuilderFlag", "DataType", "ExecutionContextAllocationStrategy", "LayerInformationFormat", "LayerType",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag", "ProfilingVerbosity", "SerializationFlag",
    "TensorIOMode",
)  # fmt: skip
for _name in _ENUMS:
    _members = [
        member for member in SURFACE["classes"][_name] if member not in ("name", "value", "as_int", "as_string")
    ]
    globals()[_name] = enum.IntEnum(_name, _members, start=0)


def _note(**call):
    with Path(os.environ["TQDIT_TEST_CALLS"]).open("a") as file:
        file.write(json.dumps(call) + "\n")


class _Guarded:
    """Instances have the recorded attributes and no others."""

    def __getattribute__(self, name):
        if not name.startswith("_") and name not in SURFACE["classes"][type(self).__name__]:
            raise AttributeError(f"TensorRT {__version__} has no {type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            if name not in SURFACE["classes"][type(self).__name__]:
                raise AttributeError(f"TensorRT {__version__} has no {type(self).__name__}.{name}")
            _note(set=name, to=getattr(value, "name", None) or (value if isinstance(value, int | str) else "object"))
        object.__setattr__(self, name, value)

    def __getattr__(self, name):
        """Recorded, but of no interest to the tests: 0, or a function that returns 0."""
        return _Zero()


class _Zero(int):
    def __call__(self, *arguments, **keywords):
        return 0


class ILogger:
    def __init__(self):
        pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IProgressMonitor:
    def __init__(self):
        pass


def init_libnvinfer_plugins(logger, namespace):
    return True


def nptype(dtype):
    return np.float32


class Builder(_Guarded):
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        _note(strongly_typed=bool(flags >> int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1))  # noqa: F821
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config._monitor
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            assert monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        refused = os.environ.get("TQDIT_TEST_REFUSE_PLUGINS") if network._custom else os.environ.get("TQDIT_TEST_FAIL")
        if refused:
            self._logger.log(Logger.ERROR, refused)
            return None
        plan = {"layers": network._layers, "weights": network._weights, "refit": "REFIT" in config._flags}
        return IHostMemory(json.dumps(plan).encode())


class IHostMemory(bytes):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def nbytes(self):
        return len(self)


class IOptimizationProfile(_Guarded):
    def set_shape(self, name, low, best, high):
        _note(profile=name, shapes=[list(low), list(best), list(high)])


class ITimingCache(_Guarded):
    def __init__(self, data):
        self._data = data

    def serialize(self):
        return IHostMemory(self._data + b"+timings")

    def combine(self, other, ignore_mismatch):
        return True


class IBuilderConfig(_Guarded):
    def __init__(self):
        object.__setattr__(self, "_monitor", None)
        self._cache, self._flags = None, set()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "progress_monitor":
            object.__setattr__(self, "_monitor", value)

    def set_flag(self, flag):
        self._flags.add(flag.name)
        _note(flag=flag.name)

    def get_flag(self, flag):
        return False

    def add_optimization_profile(self, profile):
        return 0

    def set_memory_pool_limit(self, pool, size):
        _note(pool=pool.name, bytes=size)

    def create_timing_cache(self, data):
        return ITimingCache(bytes(data))

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        _note(timing_cache=cache._data.decode())
        return True

    def get_timing_cache(self):
        return self._cache


class INetworkDefinition(_Guarded):
    def __init__(self):
        self._layers, self._inputs, self._nodes, self._custom, self._weights = [], [], [], set(), {}

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_outputs(self):
        return 0

    @property
    def num_layers(self):
        return len(self._nodes)

    @property
    def name(self):
        return "network"

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._nodes[index]

    def __iter__(self):
        return iter(())


class OnnxParser(_Guarded):
    def __init__(self, network, logger):
        self._network = network

    @property
    def num_errors(self):
        return 0

    def parse_from_file(self, path):
        graph = onnx.load(path, load_external_data=False).graph
        makers = {output: node for node in graph.node for output in node.output}
        network = self._network
        for value in graph.input:
            shape = tuple(
                dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim
            )
            network._inputs.append(SimpleNamespace(name=value.name, shape=shape, is_shape_tensor=False, dtype=None))
        plugins = os.environ.get("TQDIT_TEST_PLUGINS")
        for node in graph.node:
            plugin = bool(plugins) and node.domain == "tqdit"
            kind = LayerType.PLUGIN_V3 if plugin else LayerType.ELEMENTWISE  # noqa: F821
            network._nodes.append(SimpleNamespace(name=node.name, type=kind))
            if node.op_type in ("MatMul", "Gemm", "Conv"):
                operands = [makers.get(name) for name in node.input[:2]]
                integer = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in operands)
                network._layers.append((node.name, "Int8" if integer else "Half"))
        network._weights = _digests(graph)
        network._custom = {node.op_type for node in graph.node if node.domain == "tqdit"}
        _note(functions=len(network._custom))
        return True


class Runtime(_Guarded):
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        return ICudaEngine(json.loads(bytes(plan)))


def _digests(graph):
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


class ICudaEngine(_Guarded):
    def __init__(self, plan):
        self._plan = plan

    def create_engine_inspector(self):
        return EngineInspector(self._plan["layers"])

    def create_serialization_config(self):
        return ISerializationConfig()

    def serialize_with_config(self, config):
        return IHostMemory(json.dumps(self._plan | {"refit": "INCLUDE_REFIT" in config._flags}).encode())


class ISerializationConfig(_Guarded):
    def __init__(self):
        self._flags = set()

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)


class Refitter(_Guarded):
    def __init__(self, engine, logger):
        assert engine._plan["refit"], "the real one raises for a plan that was not built for it"
        self._engine, self._logger, self._new = engine, logger, {}

    def get_all_weights(self):
        folded = os.environ.get("TQDIT_TEST_FOLDED")
        return [name for name in self._engine._plan["weights"] if not (folded and name.startswith(folded))]

    def get_missing_weights(self):
        return sorted(set(self.get_all_weights()) - set(self._new)) if self._new else []

    def refit_cuda_engine(self):
        self._engine._plan["weights"] |= {name: self._new[name] for name in self.get_all_weights()}
        _note(refitted=len(self._new))
        return True


class OnnxParserRefitter(_Guarded):
    def __init__(self, refitter, logger):
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, path):
        refused = os.environ.get("TQDIT_TEST_REFUSE_WEIGHTS")
        if refused:
            self._logger.log(Logger.ERROR, refused)
            return False
        self._refitter._new = _digests(onnx.load(path).graph)
        return True


class EngineInspector(_Guarded):
    def __init__(self, layers):
        self._layers = layers

    def get_engine_information(self, form):
        assert form.name == "JSON"
        key, ports = ("Format/Datatype", "Bindings") if _MAJOR == 10 else ("Datatype", "I/O Tensors")
        layers = [
            {
                "Name": f"{name}_myl0_{index}", "LayerType": "gemm", "Inputs": [{"Name": "a", key: kind}],
                "Constants": [{"Name": "b", key: kind}], "Outputs": [{"Name": "c", key: "Float"}],
                "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name}:0/to_float16]",
            }
            for index, (name, kind) in enumerate(self._layers)
        ]  # fmt: skip
        if os.environ.get("TQDIT_TEST_FALLBACK"):
            for layer in layers:
                layer["Inputs"][0][key] = "Half"
        return json.dumps({"Layers": layers, ports: ["x", "x_next"]})
