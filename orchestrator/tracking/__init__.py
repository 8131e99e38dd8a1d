"""MLflow, as a projection of the results in the store. The only package that imports mlflow."""

import logging
import os

# Read by mlflow when it is imported, which every module here may be the first to do.
# The defaults retry a dead server for minutes per call; results wait on disk, so give up soon.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A bar for each of a thousand small files would be all that one sees.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

logging.getLogger("mlflow").setLevel(logging.WARNING)
# It prints what a database refused, with a traceback, and raises it: callers say it in a line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
