"""The structural fallback: a recorded call of the model proposes joints, whatever its modules are called."""
