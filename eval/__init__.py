"""After training: benchmarks, scores, tables and pictures. May import `codetune`, never `data_pipelines`."""
