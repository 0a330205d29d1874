"""From a command line to the figures of a run.

``main`` gives overrides to Hydra, which calls ``hydra_job``, or a subcommand to ``cli`` (Lightning CLI). Either makes a
``Run`` of the composed configuration (``parse``), checks it (``preflight``, with ``start`` and ``room``) and executes
it (``execute``). ``job`` claims the folder and records for a sweep how the run ended; ``ranks`` handles its processes.
"""
