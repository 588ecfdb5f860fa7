"""Sources → rows → shards → samples.

``source`` and its implementations (``shapes``, ``coco``, ``voc``, ``folder``) read rows; ``prepare``
writes them to Parquet shards (``shards``); ``reader`` reads them back; ``order`` decides which rows a
rank sees at a step; ``augment`` makes a sample of a row and a random state.
"""
