"""A trained cascade behind HTTP: OpenAI's requests for images, computed together across callers.

`app` and `server` alone know FastAPI and uvicorn, `metrics` alone prometheus-client, `run` alone
torch, `bundle` alone imagen-scale-runtime.
"""
