"""Files that mean harm: whole ones in memory, damaged and lying ones made of them by chance, and the cell in which they are read.

`cell` reads; `damage` changes bytes of any format; `headers` are safetensors, `pickles` torch files, `media` videos and sounds,
`texts` timelines, tables and JSON.
"""
