"""How a model is called without leaving a trace: modes, random state, memory, parameters;
imports from no other folder."""
