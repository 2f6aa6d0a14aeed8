# The service on a CPU. TORCH_INDEX is the package index that has CPU builds of torch (PyTorch's own, or a mirror):
#   docker build --build-arg TORCH_INDEX=https://… -t dspark-stream .
# Without it pip's own index is asked, whose torch may be the far larger build for CUDA.

FROM python:3.12-slim AS builder
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/dspark-stream
ENV PATH=/opt/dspark-stream/bin:$PATH
WORKDIR /src
# torch first and alone: a change of our source does not fetch it again.
ARG TORCH_INDEX
COPY pyproject.toml ./
# hadolint ignore=DL3013
RUN torch="$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "${torch:?pyproject.toml pins no torch}"
COPY README.md LICENSE ./
COPY src src
COPY kernels kernels
COPY web web
# Kernels for every kind of CPU lie in the package, so that the image needs no compiler.
RUN pip install . && python -m dspark_kernels.cpu --bundle

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent dspark \
    && install -d -o dspark -g dspark /var/cache/dspark-stream
COPY --from=builder /opt/dspark-stream /opt/dspark-stream
ENV PATH=/opt/dspark-stream/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache \
    DSPARK_HOST=0.0.0.0 \
    DSPARK_PORT=8000
USER 10001
# Models and capacity curves.
VOLUME /var/cache/dspark-stream
EXPOSE 8000
# Models are fetched and loaded before the service listens.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"DSPARK_PORT\"]}/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["dspark-stream"]
CMD ["serve"]
