// @ts-check
// Runs before the first paint, so that a chosen theme does not flash. No module: a module would come later.
try {
  const theme = localStorage.getItem("lmarena_proxy.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Nothing is kept in this browser: the system's theme.
}
