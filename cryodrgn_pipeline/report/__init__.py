"""Tables and maps in; one HTML page, pictures and ChimeraX scripts out."""
