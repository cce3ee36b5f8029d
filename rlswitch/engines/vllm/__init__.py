"""The only folder that imports vLLM: in process or behind its HTTP server."""
