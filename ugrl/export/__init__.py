"""A trained network, or what it labels, in the files of others: ``ugrl export``.

A format of a network is a module with one function that writes its files into a folder and returns what runs them, so
that :mod:`ugrl.export.check` can hold them against the network. What it needs is imported where it is written.
"""

#: What ``--to`` takes, and what it stands for.
FORMATS = {
    "onnx": "an ONNX graph, for onnxruntime and its like",
    "torch": "a program of torch.export, which needs no code of this project",
    "safetensors": "the layout of a hub upload, which ugrl itself reads",
    "transformers": "a SegFormer folder of transformers (MiT encoders)",
    "labels": "its pseudo-labels of a split, in VOC's layout, with weights by u, or u by pixel",
}
