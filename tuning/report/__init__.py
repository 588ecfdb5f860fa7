"""The report of a search, from its storage to its files: neither Ray nor the cluster is needed for it.

``read`` reads the study; ``luck`` says what is luck in its best score; ``findings`` are the numbers, and ``sentences``
their words. ``sections`` put them in order, ``page`` renders them, ``plots`` and ``paper`` draw; ``files`` writes it.
"""
