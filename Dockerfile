# An image with the package and what the demo needs; no test builds it.
# CPU:  docker build -t trl_apex .
# CUDA: docker build -t trl_apex --build-arg BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=demo,server
# Further options of pip, such as the index of PyTorch's CPU wheels: the default build brings CUDA's libraries.
ARG PIP_OPTIONS=
WORKDIR /trl_apex
COPY . .
RUN pip install --no-cache-dir ${PIP_OPTIONS} ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["trl-apex"]
CMD ["demo"]
