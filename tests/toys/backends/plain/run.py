import onnxruntime


class PlainEngine:
    def __init__(self, file):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs):
        return self.outputs(inputs)[0]

    def outputs(self, inputs):
        return tuple(self.session.run(None, {port.name: inputs[port.name] for port in self.session.get_inputs()}))

    def close(self):
        self.session = None


def load(folder, manifest, file, threads):
    return PlainEngine(folder / file)
