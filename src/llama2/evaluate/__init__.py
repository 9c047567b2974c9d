"""How well a model does on the paper's tasks, and how far each figure can be trusted."""
