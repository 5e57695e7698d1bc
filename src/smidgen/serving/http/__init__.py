"""HTTP on top of a Server: FastAPI, OpenAI's forms, a page to try deltas; extra `serve`."""
