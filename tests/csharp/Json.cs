#region json
using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;

/// <summary>JSON as dictionaries, lists, strings, doubles, bools and nulls; keys are case-sensitive.</summary>
public sealed class Json
{
    private readonly string text;
    private int at;

    private Json(string text) { this.text = text; }

    /// <summary>The object that the whole text is; FormatException when it is cut or something else.</summary>
    public static Dictionary<string, object> Parse(string text)
    {
        var reader = new Json(text);
        var value = reader.Value() as Dictionary<string, object>;
        reader.Space();
        if (value == null || reader.at != text.Length) throw new FormatException("no JSON object");
        return value;
    }

    /// <summary>A flat object of strings, numbers, bools and nulls as text.</summary>
    public static string Write(IDictionary<string, object> values)
    {
        var parts = new List<string>();
        foreach (var pair in values) parts.Add(Quote(pair.Key) + ":" + Scalar(pair.Value));
        return "{" + string.Join(",", parts) + "}";
    }

    private static string Scalar(object value)
    {
        if (value == null) return "null";
        if (value is bool) return (bool)value ? "true" : "false";
        if (value is string) return Quote((string)value);
        return Convert.ToString(value, CultureInfo.InvariantCulture);
    }

    private static string Quote(string value)
    {
        var quoted = new StringBuilder("\"");
        foreach (char c in value)
        {
            if (c == '"' || c == '\\') quoted.Append('\\').Append(c);
            else if (c < ' ') quoted.AppendFormat("\\u{0:x4}", (int)c);
            else quoted.Append(c);
        }
        return quoted.Append('"').ToString();
    }

    private char Next()
    {
        if (at >= text.Length) throw new FormatException("the text ends too early");
        return text[at++];
    }

    private void Space()
    {
        while (at < text.Length && " \t\r\n".IndexOf(text[at]) >= 0) at++;
    }

    private void Expect(string word)
    {
        foreach (char c in word) if (Next() != c) throw new FormatException("expected " + word);
    }

    private object Value()
    {
        Space();
        switch (Next())
        {
            case '{': return Object();
            case '[': return List();
            case '"': return String();
            case 't': Expect("rue"); return true;
            case 'f': Expect("alse"); return false;
            case 'n': Expect("ull"); return null;
            default: at--; return Number();
        }
    }

    private Dictionary<string, object> Object()
    {
        var found = new Dictionary<string, object>(StringComparer.Ordinal);
        Space();
        if (Next() == '}') return found;
        at--;
        do
        {
            Space();
            Expect("\"");
            string key = String();
            Space();
            Expect(":");
            found[key] = Value();
            Space();
        } while (More('}'));
        return found;
    }

    private List<object> List()
    {
        var found = new List<object>();
        Space();
        if (Next() == ']') return found;
        at--;
        do { found.Add(Value()); Space(); } while (More(']'));
        return found;
    }

    private bool More(char end)
    {
        char c = Next();
        if (c != ',' && c != end) throw new FormatException("expected , or " + end);
        return c == ',';
    }

    private string String()
    {
        var found = new StringBuilder();
        for (char c = Next(); c != '"'; c = Next())
        {
            if (c != '\\') { found.Append(c); continue; }
            c = Next();
            int known = "bfnrt".IndexOf(c);
            if (c == 'u')
            {
                found.Append((char)Convert.ToInt32("" + Next() + Next() + Next() + Next(), 16));
            }
            else found.Append(known < 0 ? c : "\b\f\n\r\t"[known]);
        }
        return found.ToString();
    }

    private double Number()
    {
        int start = at;
        while (at < text.Length && "+-.eE0123456789".IndexOf(text[at]) >= 0) at++;
        return double.Parse(text.Substring(start, at - start), CultureInfo.InvariantCulture);
    }
}
#endregion
