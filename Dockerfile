# Two images from one file:
#   docker build --target server -t kbop-server .     HTTP, queue, CLI: no torch
#   docker build --target worker -t kbop-worker .     scheduler and ranks: CUDA torch + DeepSpeed
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS=0 KBOP_DATA_DIR=/data
RUN useradd --create-home --uid 10001 kbop && mkdir /data && chown kbop:kbop /data
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./

FROM base AS server
COPY service service
COPY jobs jobs
COPY kbop_core kbop_core
RUN pip install -c constraints.txt .
USER kbop
VOLUME /data
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD \
  ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8700/healthz', timeout=2)"]
CMD ["kbop", "serve", "--host", "0.0.0.0"]

FROM base AS worker
# The package index's Linux build of torch brings CUDA; no compiler and no nvcc are needed.
RUN pip install -c constraints.txt torch
COPY service service
COPY jobs jobs
COPY kbop_core kbop_core
RUN pip install -c constraints.txt '.[worker]'
USER kbop
VOLUME /data
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD \
  ["python", "-c", "import sys, time; from pathlib import Path; from jobs.scheduler import last_tick; t = last_tick(Path('/data')); sys.exit(t is None or time.time() - t > 60)"]
CMD ["kbop", "worker"]
