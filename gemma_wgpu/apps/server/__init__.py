"""An HTTP server that speaks OpenAI's API. It needs the extra `server`."""
