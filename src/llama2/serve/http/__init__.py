"""HTTP itself: connections, who may ask, logs and traces, and the application that holds the surfaces together."""
