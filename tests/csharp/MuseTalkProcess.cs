#region process
using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Text;

/// <summary>What one command did.</summary>
public sealed class MuseTalkResult
{
    public int ExitCode;
    public bool TimedOut;
    public bool Success;                        // exit code 0, and the expected file is there
    public Dictionary<string, object> Answer;   // the JSON of stdout; null when there is none
    public string Errors;                       // stderr; its last lines say what to do
}

/// <summary>Runs the scripts as child processes.</summary>
public static class MuseTalkProcess
{
    /// <param name="expectedFile">What a success must have written; null for nothing.</param>
    public static MuseTalkResult Run(
        string python, string script, IEnumerable<string> arguments, string workingDirectory,
        string expectedFile, TimeSpan timeout)
    {
        var line = new StringBuilder(Quoted(script));
        foreach (string argument in arguments) line.Append(' ').Append(Quoted(argument));
        var start = new ProcessStartInfo
        {
            FileName = python,
            Arguments = line.ToString(),
            WorkingDirectory = workingDirectory,
            UseShellExecute = false,
            CreateNoWindow = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            StandardOutputEncoding = new UTF8Encoding(false),
            StandardErrorEncoding = new UTF8Encoding(false),
        };
        var output = new StringBuilder();
        var errors = new StringBuilder();
        using (var process = new Process { StartInfo = start })
        {
            // Both streams are drained all the time: a full pipe would stop the child.
            process.OutputDataReceived += (sender, e) => { if (e.Data != null) output.AppendLine(e.Data); };
            process.ErrorDataReceived += (sender, e) => { if (e.Data != null) errors.AppendLine(e.Data); };
            process.Start();
            process.BeginOutputReadLine();
            process.BeginErrorReadLine();
            bool ended = process.WaitForExit((int)timeout.TotalMilliseconds);
            if (!ended) KillTree(process);
            process.WaitForExit();              // until the streams are read to their ends
            var result = new MuseTalkResult { TimedOut = !ended, ExitCode = process.ExitCode };
            result.Errors = errors.ToString();
            try { result.Answer = Json.Parse(output.ToString()); } catch (FormatException) { }
            result.Success = ended && result.ExitCode == 0 && (expectedFile == null || File.Exists(expectedFile));
            return result;
        }
    }

    /// <summary>One argument in double quotes, by the rules of Windows; other systems read it alike.</summary>
    private static string Quoted(string argument)
    {
        var quoted = new StringBuilder("\"");
        int backslashes = 0;
        foreach (char c in argument)
        {
            if (c == '"') quoted.Append('\\', backslashes + 1);    // those before a quote count double
            backslashes = c == '\\' ? backslashes + 1 : 0;
            quoted.Append(c);
        }
        return quoted.Append('\\', backslashes).Append('"').ToString();
    }

    /// <summary>Ends the process and the ffmpeg that it may have started.</summary>
    private static void KillTree(Process process)
    {
        bool windows = Path.DirectorySeparatorChar == '\\';
        string id = process.Id.ToString();
        try
        {
            var whole = windows
                ? new ProcessStartInfo("taskkill", "/T /F /PID " + id)
                : new ProcessStartInfo("pkill", "-KILL -P " + id);
            whole.UseShellExecute = false;
            whole.CreateNoWindow = true;
            using (var killer = Process.Start(whole)) killer.WaitForExit();
        }
        catch (System.ComponentModel.Win32Exception) { }    // no such tool: ffmpeg ends when Python is gone
        try { process.Kill(); } catch (InvalidOperationException) { }    // it has ended
    }
}
#endregion
