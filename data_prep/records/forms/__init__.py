"""Parts of the normal form of a row (`data_prep/records/row_forms.py`): turns, pictures, boxes, refusals."""
