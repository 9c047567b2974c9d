// Runs before the first paint, so that the page does not flash in the wrong colours. The default is the system's theme.
try {
  const theme = localStorage.getItem("llama2-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // the browser has no storage
}
