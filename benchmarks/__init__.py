"""Benchmarks. Each one is a command: python -m benchmarks COMMAND --help.

latency    latency of the whole pipeline, in milliseconds per picture
compare    whether one latency result is slower than another
report     one HTML page of all latency results in a folder
quality    scores of the labels on pictures that people have labelled
protocol   scores of predictions in a folder, as publications compute them
stream     scores, latency and memory of a stream of frames
step       time of a refinement step, compared with PyTorch and ONNX Runtime
ops        time of single operations, compared with PyTorch and OpenCV
photo      time from the start of a process to the labels of one photo
gpu        time of the CUDA module, compared with PyTorch on the same GPU
"""

__dist__ = "dynaguide-edge"
