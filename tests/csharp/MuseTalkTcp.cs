#region tcp
using System;
using System.Collections.Generic;
using System.IO;
using System.Net.Sockets;
using System.Text;

/// <summary>Port 58080: one connection kept for hours, one JSON object a line, one answer for each.</summary>
public sealed class MuseTalkLines : IDisposable
{
    private readonly string host;
    private readonly int port;
    private readonly int timeout;
    private readonly object turn = new object();
    private TcpClient connection;

    public MuseTalkLines(string host, int port = 58080, int timeoutMilliseconds = 30000)
    {
        this.host = host;
        this.port = port;
        timeout = timeoutMilliseconds;
    }

    /// <summary>Asks and waits for the answer; connects again once when the connection is gone.</summary>
    public Dictionary<string, object> Ask(string command, params object[] namesAndValues)
    {
        var request = new Dictionary<string, object> { { "command", command } };
        for (int i = 0; i < namesAndValues.Length; i += 2) request[(string)namesAndValues[i]] = namesAndValues[i + 1];
        byte[] line = new UTF8Encoding(false).GetBytes(Json.Write(request) + "\n");
        lock (turn)
        {
            bool kept = connection != null;
            try { return Exchange(line); }
            catch (IOException)
            {
                Close();
                if (!kept) throw;
                try { return Exchange(line); } catch (IOException) { Close(); throw; }
            }
        }
    }

    private Dictionary<string, object> Exchange(byte[] line)
    {
        if (connection == null)
        {
            connection = new TcpClient(host, port) { NoDelay = true };
            connection.ReceiveTimeout = connection.SendTimeout = timeout;
        }
        var stream = connection.GetStream();
        stream.Write(line, 0, line.Length);
        var received = new MemoryStream();
        var block = new byte[4096];
        while (true)
        {
            int count = stream.Read(block, 0, block.Length);
            if (count == 0) throw new IOException("the worker closed the connection");
            received.Write(block, 0, count);
            // The answer has no length: it is whole once it can be read.
            try { return Json.Parse(Encoding.UTF8.GetString(received.ToArray())); }
            catch (FormatException) { }
        }
    }

    private void Close()
    {
        if (connection != null) connection.Close();
        connection = null;
    }

    public void Dispose() { Close(); }
}

/// <summary>The HTTP port's older protocol: a length, then JSON; one request a connection.</summary>
public static class MuseTalkFramed
{
    public static Dictionary<string, object> Render(
        string host, int port, string templateId, string audioPath, string outputPath, string cacheDir = null,
        int batchSize = 8, int fps = 25)
    {
        var request = new Dictionary<string, object>
        {
            { "template_id", templateId }, { "audio_path", audioPath }, { "output_path", outputPath },
            { "cache_dir", cacheDir }, { "batch_size", batchSize }, { "fps", fps },
        };
        byte[] body = new UTF8Encoding(false).GetBytes(Json.Write(request));
        using (var connection = new TcpClient(host, port))
        {
            var stream = connection.GetStream();
            stream.Write(BitConverter.GetBytes((uint)body.Length), 0, 4);
            stream.Write(body, 0, body.Length);
            var length = new byte[4];
            if (stream.Read(length, 0, 4) != 4) throw new IOException("the worker closed the connection");
            var answer = new byte[BitConverter.ToUInt32(length, 0)];
            for (int have = 0; have < answer.Length;)
            {
                int count = stream.Read(answer, have, answer.Length - have);
                if (count == 0) throw new IOException("the answer ends too early");
                have += count;
            }
            return Json.Parse(Encoding.UTF8.GetString(answer));
        }
    }
}
#endregion
