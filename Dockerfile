# `docker build -t items .` reads this. To change Python: the first FROM, once the tests pass on it.

FROM python:3.13-slim-trixie AS base

FROM base AS packages
WORKDIR /build
COPY requirements.txt ./
# Wheels only: a package that has none for this platform fails here, not at a missing compiler.
RUN sed -i '/^# --- Tests/,$d' requirements.txt \
    && python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --only-binary=:all: -r requirements.txt

FROM base
# A new volume takes its owner from here; a folder of the host's must be given to 10001 there.
RUN install -d -o 10001 -g 10001 /data
VOLUME /data
WORKDIR /app
COPY --from=packages /venv /venv
# Root's, so that whoever breaks into the service cannot change it; readable whatever the umask of the checkout.
COPY --chmod=444 main.py gunicorn.conf.py ./
# The base image has no bytecode and a read-only tree gets none: every start and every health
# check would compile the standard library anew. What does not load fails here, too.
RUN ENVIRONMENT=development /venv/bin/gunicorn --check-config
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DATABASE_URL=sqlite:////data/app.db
# Numbers: Kubernetes' runAsNonRoot cannot judge a name. In no passwd file: nobody can log in as it.
USER 10001:10001
EXPOSE 8000
# By gunicorn's own reading of an address; http.client, because urllib would ask a configured proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import os, socket; \
from http.client import HTTPConnection; \
from gunicorn.util import parse_address; \
bind = os.getenv('BIND') or ':' + (os.getenv('PORT') or '8000'); \
address = parse_address(bind.split(',')[0]); \
family = 'UNIX' if isinstance(address, str) else 'INET6' if ':' in address[0] else 'INET'; \
server = HTTPConnection('localhost'); \
server.sock = socket.socket(socket.AddressFamily['AF_' + family]); \
server.sock.settimeout(4); \
server.sock.connect(address); \
server.request('GET', '/health/live'); \
exit(server.getresponse().status != 200)"]
CMD ["gunicorn"]
