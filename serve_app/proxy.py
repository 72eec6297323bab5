"""What clusters name: ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.proxy:middlewares``."""

from serve_app.hooks.proxy import middlewares as middlewares
