using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Text;
using System.Threading;

/// <summary>Drives the clients for the tests: arguments in, one line of JSON per answer out.</summary>
public static class Program
{
    private static readonly TextWriter Out =
        new StreamWriter(Console.OpenStandardOutput(), new UTF8Encoding(false)) { AutoFlush = true };

    public static int Main(string[] arguments)
    {
        string[] rest = arguments.Skip(1).ToArray();
        switch (arguments[0])
        {
            case "process": RunProcess(rest); return 0;
            case "http": Http(rest[0], rest[1], rest[2], rest.Skip(3).ToArray()); return 0;
            case "http-failures": HttpFailures(rest[0], rest[1]); return 0;
            case "lines": Lines(int.Parse(rest[0]), rest[1], rest[2], rest[3], rest[4], rest[5]); return 0;
            case "pipelined": Pipelined(int.Parse(rest[0]), rest[1], rest[2], rest[3]); return 0;
            case "framed": Framed(int.Parse(rest[0]), rest[1], rest[2], rest[3]); return 0;
            case "json": Out.WriteLine(Shown(Json.Parse(File.ReadAllText(rest[0], Encoding.UTF8)))); return 0;
            default: return 2;
        }
    }

    private static void RunProcess(string[] rest)
    {
        // python, script, working directory, expected file, seconds, arguments
        var result = MuseTalkProcess.Run(
            rest[0], rest[1], rest.Skip(5), rest[2], rest[3] == "" ? null : rest[3], TimeSpan.FromSeconds(double.Parse(rest[4])));
        Print(new Dictionary<string, object>
        {
            { "exit_code", result.ExitCode }, { "timed_out", result.TimedOut }, { "success", result.Success },
            { "errors", result.Errors }, { "frames", Value(result.Answer, "frames") },
            { "error_code", Value(result.Answer, "error_code") }, { "answered", result.Answer != null },
        });
    }

    private static void Http(string address, string templateId, string image, string[] segments)
    {
        using (var client = new MuseTalkHttp(address))
        {
            Print(new Dictionary<string, object> { { "healthy", client.Healthy() } });
            Print(client.Initialize());
            Print(client.Initialize());
            Print(client.PreprocessTemplate(templateId, image));
            string session = Guid.NewGuid().ToString();
            Print(client.StartSession(session, templateId));
            for (int i = 0; i < segments.Length; i++)
            {
                var answer = client.ProcessSegment(session, segments[i], i, i == segments.Length - 1);
                answer["downloaded"] = (double)client.Download((string)answer["video_url"]).Length;
                Print(answer);
            }
            Print(client.EndSession(session));
            Print(client.Render(templateId, segments[0]));
            Print(client.Status());
        }
    }

    private static void HttpFailures(string address, string audio)
    {
        using (var client = new MuseTalkHttp(address))
        {
            Failing(() => client.StartSession("s", "nobody"));
            Failing(() => client.ProcessSegment("none", audio, 0, true));
            Failing(() => client.PreprocessTemplate("x", "/nowhere/x.jpg"));
            Failing(() => client.EndSession("none"));
        }
    }

    private static void Failing(Func<Dictionary<string, object>> call)
    {
        try { Print(call()); }
        catch (MuseTalkException e)
        {
            var answer = Json.Parse(e.Message);
            answer["status"] = (double)e.Status;
            Print(answer);
        }
    }

    private static void Lines(int port, string templateId, string image, string audio, string output, string cache)
    {
        using (var client = new MuseTalkLines("127.0.0.1", port, 120000))
        {
            Print(client.Ask("ping"));
            Print(client.Ask("status"));
            Print(client.Ask("check_cache", "template_id", templateId));
            Print(client.Ask("preprocess", "template_id", templateId, "template_image_path", image,
                "bbox_shift", 0, "parsing_mode", "jaw"));
            Print(client.Ask("check_cache", "template_id", templateId));
            var asked = new Thread(() => Print(client.Ask("inference", "template_id", templateId,
                "audio_path", audio, "output_path", output, "template_dir", Path.GetDirectoryName(image),
                "cache_dir", cache, "batch_size", 8, "fps", 25, "bbox_shift", 0, "parsing_mode", "jaw")));
            asked.Start();
            asked.Join();
            Print(client.Ask("inference", "template_id", "nobody", "audio_path", audio, "output_path", output));
        }
    }

    /// <summary>A ping sent behind an inference before that is answered: two answers, in order.</summary>
    private static void Pipelined(int port, string templateId, string audio, string output)
    {
        using (var connection = new TcpClient("127.0.0.1", port))
        {
            string inference = Json.Write(new Dictionary<string, object>
                { { "command", "inference" }, { "template_id", templateId }, { "audio_path", audio }, { "output_path", output } });
            string ping = Json.Write(new Dictionary<string, object> { { "command", "ping" } });
            byte[] both = Encoding.UTF8.GetBytes(inference + "\n" + ping + "\n");
            connection.GetStream().Write(both, 0, both.Length);
            var reader = new StreamReader(connection.GetStream(), new UTF8Encoding(false));
            for (int i = 0; i < 2; i++) Print(Json.Parse(reader.ReadLine()));
        }
    }

    private static void Framed(int port, string templateId, string audio, string output)
    {
        Print(MuseTalkFramed.Render("127.0.0.1", port, templateId, audio, output));
        Print(MuseTalkFramed.Render("127.0.0.1", port, "nobody", audio, output));
    }

    private static object Value(Dictionary<string, object> answer, string key)
    {
        object value = null;
        if (answer != null) answer.TryGetValue(key, out value);
        return value;
    }

    private static void Print(Dictionary<string, object> answer) { Out.WriteLine(Shown(answer)); }

    /// <summary>The scalars of an answer as JSON, nested values by their kinds.</summary>
    private static string Shown(Dictionary<string, object> answer)
    {
        var flat = new Dictionary<string, object>(StringComparer.Ordinal);
        foreach (var pair in answer)
        {
            var list = pair.Value as List<object>;
            if (list != null) flat[pair.Key] = "list of " + list.Count;
            else flat[pair.Key] = pair.Value is Dictionary<string, object> ? "object" : pair.Value;
        }
        return Json.Write(flat);
    }
}
