# docker build -t megakexue . && docker run --rm megakexue              # the demo, on CPUs
# docker run --rm megakexue make test
# docker run --rm --gpus all -v "$PWD/runs:/megakexue/runs" megakexue   # with GPUs, and with what it leaves
FROM python:3.11-bookworm
WORKDIR /megakexue
# g++ and git are in the image: blocks are compiled on CPUs, and a run notes the commit of its code
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY megakexue megakexue
RUN make setup
COPY . .
RUN touch .venv/installed
ENV PATH=/megakexue/.venv/bin:$PATH
CMD ["make", "demo"]
