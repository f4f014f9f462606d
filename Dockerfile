# A stock Triton Inference Server with this package; the model repository is mounted:
#   docker build -t trtforge .
#   docker run --rm -p 8000-8002:8000-8002 -v "$PWD/repository:/models:ro" trtforge
# Written without a Docker engine at hand: linted, but never built.
ARG TRITON_TAG=26.06-py3
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG}

# Triton's python backend runs the image's own Python, so the package goes there and not into a venv.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . /opt/trtforge
# Such as ray, for ranks on several machines.
ARG EXTRAS=
RUN pip install "/opt/trtforge[${EXTRAS}]"

# triton-server, the unprivileged user of the stock image.
USER 1000:1000
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models", "--disable-auto-complete-config"]
