package api

import (
	"errors"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/openlock/openlock/internal/auth"
)

// serviceTokenLife is how long a B2B service's token lasts.
const serviceTokenLife = time.Hour

// oauthFail is an error of the token endpoint: RFC 6749 section 5.2 within the
// one error body.
func oauthFail(status int, name, message string) *problem {
	return &problem{Name: name, Code: status, Message: message, Description: message}
}

// oauthToken gives a B2B service a token for its client credentials (RFC 6749
// section 4.4).
func (s *Server) oauthToken(c *call) error {
	form, err := s.form(c)
	if err != nil {
		return err
	}
	if form.Get("grant_type") != "client_credentials" {
		return oauthFail(http.StatusBadRequest, "unsupported_grant_type", "grant_type must be client_credentials")
	}
	id, secret, err := clientCredentials(c.r, form)
	if err != nil {
		return err
	}
	client, err := s.who.Client(c.r.Context(), id, secret)
	if errors.Is(err, auth.ErrUnauthenticated) {
		c.w.Header().Set("WWW-Authenticate", `Basic realm="openlock"`)
		return oauthFail(http.StatusUnauthorized, "invalid_client", "the client id or secret is wrong, expired or revoked")
	}
	if err != nil {
		return err
	}
	scopes := client.Scopes
	if asked := strings.Fields(form.Get("scope")); len(asked) > 0 {
		if slices.ContainsFunc(asked, func(s string) bool { return !slices.Contains(client.Scopes, s) }) {
			return oauthFail(http.StatusBadRequest, "invalid_scope", "this client may ask for: "+strings.Join(client.Scopes, " "))
		}
		scopes = asked
	}
	token, _, err := s.builtin.Service(client.ID, client.Org, scopes, serviceTokenLife, s.clock.Wall())
	if err != nil {
		return err
	}
	c.json(http.StatusOK, struct {
		AccessToken string `json:"access_token"`
		TokenType   string `json:"token_type"`
		ExpiresIn   int    `json:"expires_in"`
		Scope       string `json:"scope"`
	}{token, "Bearer", int(serviceTokenLife.Seconds()), strings.Join(scopes, " ")})
	return nil
}

// form reads the body alone: credentials in a query are none.
func (s *Server) form(c *call) (url.Values, error) {
	t, _, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || t != "application/x-www-form-urlencoded" {
		return nil, oauthFail(http.StatusBadRequest, "invalid_request", "send the parameters as application/x-www-form-urlencoded")
	}
	c.r.Body = http.MaxBytesReader(c.w, c.r.Body, bodyMost)
	if err := c.r.ParseForm(); err != nil {
		return nil, oauthFail(http.StatusBadRequest, "invalid_request", "the form could not be read")
	}
	for name, values := range c.r.PostForm {
		if len(values) > 1 {
			return nil, oauthFail(http.StatusBadRequest, "invalid_request", "a parameter may come only once: "+cut(name, 40))
		}
	}
	return c.r.PostForm, nil
}

// clientCredentials come as HTTP Basic or in the form, not both (RFC 6749
// section 2.3).
func clientCredentials(r *http.Request, form url.Values) (id, secret string, err error) {
	id, secret, basic := r.BasicAuth()
	if !basic && len(r.Header.Values("Authorization")) > 0 { // no falling back from what cannot be read
		return "", "", oauthFail(http.StatusBadRequest, "invalid_request", "the Authorization header must be Basic, with the client's credentials")
	}
	if !basic {
		return form.Get("client_id"), form.Get("client_secret"), nil
	}
	if form.Has("client_secret") {
		return "", "", oauthFail(http.StatusBadRequest, "invalid_request", "send the client's credentials in one way only")
	}
	id, err1 := url.QueryUnescape(id) // section 2.3.1: form-encoded before Basic
	secret, err2 := url.QueryUnescape(secret)
	if err1 != nil || err2 != nil {
		return "", "", oauthFail(http.StatusBadRequest, "invalid_request", "client id and secret must be form-encoded")
	}
	return id, secret, nil
}
