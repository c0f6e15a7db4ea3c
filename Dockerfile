# `docker build -t items .` reads this. To change Python, change the first FROM.

FROM python:3.13-slim-trixie AS base

FROM base AS packages
WORKDIR /build
COPY requirements.txt ./
# Wheels only, because the image has no compiler: pip names a package without a wheel.
RUN sed -i '/^# --- Tests/,$d' requirements.txt \
    && python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install \
        --no-cache-dir --only-binary=:all: -r requirements.txt

FROM base
# A new volume takes the owner from this folder. (Give a bind mount's folder to 10001.)
# OpenShift runs an image under a random uid of group 0, so this group may write, too.
RUN install -d -o 10001 -g 0 -m 775 /data
VOLUME /data
WORKDIR /app
COPY --from=packages /venv /venv
# The files belong to root, so that an intruder cannot change the code that runs next.
# Mode 444, because files made under a umask of 077 would be unreadable for uid 10001.
COPY --chmod=444 main.py gunicorn.conf.py ./
# This run stores the bytecode, also of Python's own library: the base image has none.
# Otherwise, because uid 10001 cannot write it, each start and each health check would
# compile the code again (measured: 0.8 s and 0.3 s of CPU more).
RUN ENVIRONMENT=development /venv/bin/gunicorn --check-config
# The environment outranks /run/secrets: to give DATABASE_URL there, set this one empty.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DATABASE_URL=sqlite:////data/app.db
# Numbers: Kubernetes' runAsNonRoot cannot check a name. Without a line in /etc/passwd,
# nobody can log in as this user.
USER 10001:0
EXPOSE 8000
# gunicorn's own function reads BIND. (urllib would use the proxy of HTTP_PROXY.)
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
