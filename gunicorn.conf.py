"""gunicorn reads this file by itself, in the folder that it is started in."""

import os

wsgi_app = "main:app"
bind = os.getenv("BIND", "0.0.0.0:8000")
workers = 1
worker_class = "uvicorn_worker.UvicornWorker"
preload_app = True
control_socket_disable = True
