# docker build --tag fourier-moe . && docker run --gpus all --volume "$PWD/runs:/work/runs" fourier-moe fit --config demo
FROM python:3.12-slim
COPY . /source
RUN pip install --no-cache-dir "/source[train]" && rm -rf /source
WORKDIR /work
ENTRYPOINT ["fourier-moe"]
