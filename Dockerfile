# `docker build -t items .` reads this. To change Python, change the first FROM.

FROM python:3.13-slim-trixie AS base

FROM base AS packages
WORKDIR /build
COPY requirements.txt ./
# Wheels only: where one is missing it says so here, not by the lack of a compiler.
RUN sed -i '/^# --- Tests/,$d' requirements.txt \
    && python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install \
        --no-cache-dir --only-binary=:all: -r requirements.txt

FROM base
# A new volume takes its owner from here; a bind mount needs its folder given to 10001.
# Group 0 may write, too: OpenShift runs an image under any uid of that group.
RUN install -d -o 10001 -g 0 -m 775 /data
VOLUME /data
WORKDIR /app
COPY --from=packages /venv /venv
# Root's, so that whoever breaks in cannot change the code that the next start runs;
# 444, because under a umask of 077 the user could not read it either.
COPY --chmod=444 main.py gunicorn.conf.py ./
# For the bytecode: the base image has none, a read-only tree gets none, and each start
# and health check would compile anew (measured: 0.8 s and 0.3 s of CPU more).
RUN ENVIRONMENT=development /venv/bin/gunicorn --check-config
# The environment outranks /run/secrets: to give DATABASE_URL there, set this one empty.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DATABASE_URL=sqlite:////data/app.db
# Numbers, because Kubernetes' runAsNonRoot cannot judge a name; and with no line in
# /etc/passwd there is nothing to log in to.
USER 10001:0
EXPOSE 8000
# gunicorn's own reading of BIND; not urllib, which would ask the proxy of HTTP_PROXY.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import os, socket; \
from http.client import HTTPConnection; \
from gunicorn.util import parse_address; \
bind = os.getenv('BIND', '').strip() or ':' + (os.getenv('PORT', '').strip() or '8000'); \
address = parse_address(bind.split(',')[0].strip()); \
server = HTTPConnection('localhost'); \
server.sock = socket.socket( \
    socket.AF_UNIX if isinstance(address, str) else \
    socket.AF_INET6 if ':' in address[0] else socket.AF_INET \
); \
server.sock.settimeout(4); \
server.sock.connect(address); \
server.request('GET', '/health/live'); \
exit(server.getresponse().status != 200)"]
CMD ["gunicorn"]
