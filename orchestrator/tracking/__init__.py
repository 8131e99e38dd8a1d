"""MLflow, as a projection of the results in the store. The only package that imports mlflow."""

import logging
import os

# Read by mlflow when it is imported, so set first.
# The defaults retry a dead server for minutes per call. The results are on disk: give up soon.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The default is 500. A quoted letter takes up to 12, so that an ordinary path may be longer.
os.environ.setdefault("MLFLOW_ARTIFACT_LOCATION_MAX_LENGTH", "16384")
# A line per ended run, with its address and that of its experiment, which `btu ui` prints once.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# A progress bar per small file would fill the screen.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

# Here, because its import sets the level of its logger, and would undo what follows.
import mlflow  # noqa: F401

logging.getLogger("mlflow").setLevel(logging.WARNING)
# It prints a database's refusal with a traceback and raises it too: callers report it in a line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
